"""The endpoints, one Flask blueprint (`routes`) per module. Routes hold no logic of their own."""
