"""What a model costs, counted from its shapes and measured on this machine. Run `python -m llava.efficiency --help`."""
