"""The table-top world: rules, expert, MuJoCo simulator and JAX environment."""
