"""Code that the API and the workers share. It imports neither Flask nor MLX."""

from typing import Final

VERSION: Final = "0.1.0.dev0"
"""Version of the code. No version has been released yet."""
