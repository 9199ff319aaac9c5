"""The training loops: `online` (PPO and its kin), `supervised` (SFT, reward model), `preferences`."""
