"""The verbs: commit, checkout, restore, gc, verify, rebuild; `store` is the front door to them."""
