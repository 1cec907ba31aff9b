"Build script: metadata comes from settings.ini, the course and its results travel inside the wheel"
import configparser
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
config = configparser.ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("crf", "fast", "fid", "export", "stream", "course", "test", "dev")}
extras["course"] += extras["export"]  # chapter 67
extras["dev"] += extras["test"] + extras["course"]


class BuildWithCourse(build_py):
    "Copy notebooks and recorded results to synseg/course, where `synseg notebooks` finds them"

    def run(self):
        super().run()
        for folder, pattern in (("nbs", "*.ipynb"), ("nbs", "*.bib"), ("nbs/images", "*"), ("results", "*.json")):
            target = Path(self.build_lib) / "synseg" / "course" / folder
            for source in sorted((ROOT / folder).glob(pattern)):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / source.name)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["synseg", "synseg.*"]),
    package_data={"synseg": ["py.typed", "weights/*.safetensors"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split("\n"),
                  "nbdev": [f"{cfg['lib_name']} = {cfg['lib_path']}._modidx:d"]},
    cmdclass={"build_py": BuildWithCourse},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        *[f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)],
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
