"""One class per alignment measure; `analysis.alignment.forward_pass` lists those of each pass."""
