"""From a run to a hub folder, and from there to the Hugging Face Hub."""

from .export import export
from .export_frozen import export_frozen, is_frozen_folder
from .upload import Published, publish

__all__ = ["Published", "export", "export_frozen", "is_frozen_folder", "publish"]
