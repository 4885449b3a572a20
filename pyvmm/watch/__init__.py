"""A running machine as people look at it: its rings, rates and events, by the control socket."""
