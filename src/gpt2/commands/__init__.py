"""What each verb of the command line does: one file a verb, each with `main(argv)`, imported when it is chosen."""
