"""What the stages share, one subject a module. No module here imports a stage."""
