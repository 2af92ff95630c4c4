"""What works on windows of samples: bags, the plan, overlap-add, batches, backends."""
