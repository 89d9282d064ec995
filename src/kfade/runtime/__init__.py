"""What every room uses: processes, stages, progress, output folders."""
