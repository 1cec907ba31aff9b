"""Put a trained network among those that ship with the package: without its auxiliary head, two bytes for each weight.

    synseg recipe run scenes_contextnet_cn14 --profile cpu --out recipes --record results
    python tools/ship.py recipes/scenes_contextnet_cn14/cpu/run
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from synseg.zoo import create_model, load_model, save_model  # noqa: E402

MEGABYTES = 8  # all of them together


def ship(run, folder):
    "Write folder/MODEL-scenes.safetensors from the weights of a run, and return its path"
    trained = load_model(Path(run) / "model.safetensors")
    card = trained.card
    plain = create_model(card.name, card.num_classes, **{k: v for k, v in card.options.items() if k != "aux"})
    missing, _ = plain.load_state_dict(trained.state_dict(), strict=False)
    if missing:
        raise ValueError(f"{card.name} needs {missing}, which {run} does not hold")
    return save_model(plain, Path(folder) / f"{card.name}-scenes.safetensors", card.label_space, card.input_size, half=True)


if __name__ == "__main__":
    path = ship(sys.argv[1], ROOT / "synseg" / "weights")
    size = sum(p.stat().st_size for p in path.parent.glob("*.safetensors")) / 1e6
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB, all together {size:.1f} MB")
    if size > MEGABYTES:
        sys.exit(f"that is more than {MEGABYTES} MB")
