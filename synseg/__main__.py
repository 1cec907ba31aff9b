"`python -m synseg` is the command `synseg`; under several processes: `torchrun --nproc-per-node 2 -m synseg train ...`"
from .cli import main

if __name__ == "__main__": main()
