"""Other frameworks' own ways to save and load, with a store behind them. One framework each; none knows another."""
