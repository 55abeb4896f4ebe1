"""Order of the requests, and the costs, forecasts and loads behind it. Pure Python."""
