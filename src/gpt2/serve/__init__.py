"""The server: any OpenAI client in, tokens out; and the playground, which shows why."""
