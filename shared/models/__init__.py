"""What is known about models without loading them: the catalog, model folders, and the workers that serve them."""
