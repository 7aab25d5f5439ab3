"""The policy stages (preference optimization, PPO). They build on the reward stage and on rlhf."""
