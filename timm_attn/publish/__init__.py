"""From a run to a hub folder, and from there to the Hugging Face Hub."""

from .export import export
from .upload import Published, publish

__all__ = ["Published", "export", "publish"]
