"""An inference engine for Llama 3.2 Vision built on static-shaped, paged, compiled graphs."""

__version__ = "0.1.0"
