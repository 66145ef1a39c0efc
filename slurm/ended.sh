#!/usr/bin/env bash
# Slurm runs this when a task has ended, however it did: from now on nobody waits for its sign of life.
rm -f "$TRSR_SIGNS/$SLURM_PROCID"-*
touch "$TRSR_SIGNS/ended-$SLURM_STEP_NUM_TASKS-$SLURM_PROCID"
