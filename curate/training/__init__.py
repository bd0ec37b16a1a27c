"""What training did: step records, state snapshots, and their replay."""
