"""What Kimi K2 is built on, as experiments that anyone can run; docs/claims.md says what they show."""
