"""Work on logits between the forward pass and the sampler: processors such as penalties, and log-probabilities."""
