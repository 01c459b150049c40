"""What a memory costs a served model: engines side by side, measured in turns."""
