"""Both worlds side by side: the same run simulated and measured, compared and judged."""
