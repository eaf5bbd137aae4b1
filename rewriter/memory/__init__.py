"""The planner: what each layer keeps, repeats or offloads, by a simulated step's memory and time."""
