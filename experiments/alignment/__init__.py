"""Does alignment work? The paper's ablation at the size of two CPU cores."""
