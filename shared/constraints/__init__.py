"""Constraints on answers: checks them and compiles them to llguidance grammars."""
