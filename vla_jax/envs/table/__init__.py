"""The table-top environment: rules, expert, MuJoCo simulator and JAX environment."""
