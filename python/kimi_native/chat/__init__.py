"""The conversation side: messages, prompts from messages, events from output ids. Imports no torch."""
