"""Pure scheduling: values in, values out. Standard library only, no clock but the one handed in."""
