"""The audit log: who changed which session when, in a file that shows what was done to it afterwards."""
