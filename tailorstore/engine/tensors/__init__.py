"""The door to torch: everything that touches a tensor, a module or an optimizer lives in this folder."""
