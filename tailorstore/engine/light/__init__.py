"""Light versions: layers as quantised differences to a full version of themselves."""
