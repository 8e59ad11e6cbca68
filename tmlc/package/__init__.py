"""The package (`.tmlc`): manifest, reader, writer. Needs numpy and the standard library only."""

from tmlc.package.manifest import Manifest
from tmlc.package.reader import Package, open_package
from tmlc.package.safetensors_io import TensorEntry, WeightItem
from tmlc.package.writer import PackageWriter

__all__ = ["Manifest", "Package", "PackageWriter", "TensorEntry", "WeightItem", "open_package"]
