// Errors of the server, as the page shows them.

export class ServerError extends Error {
  constructor(message, param) {
    super(message);
    this.param = param; // field of the request that is wrong, or null
  }
}

// The user dismissed the key dialog: it does not open again by itself.
export class KeyDeclined extends ServerError {}
