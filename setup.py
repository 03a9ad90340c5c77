"""Packaging, read from settings.ini."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class WithSandbox(build_py):
    "What lies beside the library in a clone lies inside it in a wheel: the sandbox, the studies' results, the notebooks that a person runs."
    def run(self):
        super().run()
        if self.editable_mode: return
        for f in (*Path("data").rglob("*"), *Path("nbs").glob("*.ipynb")):
            if not f.is_file(): continue
            to = Path(self.build_lib) / "unlearn_wb" / f
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(f, to)


config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
c = config["DEFAULT"]

setup(
    name=c["lib_name"], version=c["version"], license="Apache-2.0", description=c["description"], author=c["author"], keywords=c["keywords"],
    long_description=open("README.md", encoding="utf-8").read(), long_description_content_type="text/markdown",
    packages=find_packages(include=["unlearn_wb*"]), cmdclass={"build_py": WithSandbox}, zip_safe=False, python_requires=">=" + c["min_python"],
    install_requires=c["requirements"].split(), extras_require={"dev": c["dev_requirements"].split(), "nudity": ["nudenet"], "faces": ["insightface", "onnxruntime"], "lpips": ["lpips", "torchvision"], "inception": ["torch-fidelity", "torchvision"]},
    entry_points={"nbdev": [f"{c['lib_name']}={c['lib_name']}._modidx:d"]},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research", "Programming Language :: Python :: 3", "License :: OSI Approved :: Apache Software License"],
)
