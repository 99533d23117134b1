"""Code that the API and the workers share. It imports neither Flask nor MLX."""
