"""The policy stages (preference optimisation, PPO). They build on the reward stage and on rlhf."""
