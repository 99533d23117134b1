"""The Messages API of Anthropic: requests become jobs, and their answers become messages and events."""
