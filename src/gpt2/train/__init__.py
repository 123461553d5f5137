"""From batches to a run folder: config -> optim -> trainer -> checkpoint, with report beside them."""
