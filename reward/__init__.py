"""The reward stage: Bradley-Terry reward models with adaptive optimal-transport margins."""
