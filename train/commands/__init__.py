"""The commands of `train`: options and printing. The libraries behind them are imported when a command runs."""
