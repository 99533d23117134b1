"""What happens to logits between the forward pass and the sampler: processors, and log-probabilities beside them."""
