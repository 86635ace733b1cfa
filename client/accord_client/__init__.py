"""The partner site: data, model, differentially private training, durable privacy state."""
