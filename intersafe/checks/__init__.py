"""Rules on one message or one answer, shared by the stages and the gates."""
