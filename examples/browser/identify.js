// Sends identities from a page to the relay. Copy this file into your frontend; it has no dependencies.

const MAX_ATTEMPTS = 4
const FIRST_PAUSE_MS = 500

/** A page is rarely open for longer. If the relay asks for a longer pause, the last answer counts. */
const MAX_PAUSE_MS = 60_000

/** The statuses after which the same request may succeed, also where a proxy answers for the relay. */
const RETRYABLE = [429, 502, 503, 504]

/**
 * Resolves with `accepted` or `queued`. Rejects with an error whose `problem` is the answer of the relay, if there was
 * one. An answer that may change, and a request without an answer, are repeated; a repeat is always safe.
 *
 * @param {object} options
 * @param {string} options.relayUrl the URL of the relay, without a slash at its end
 * @param {string} options.userId the id of the user, who has signed in
 * @param {string} options.anonymousId what `mixpanel.get_distinct_id()` returned before the user was identified
 * @param {() => string | Promise<string>} [options.getToken] returns the user's short-lived token (JWT). It is called
 *   for each attempt. Without it the caller is anonymous.
 */
export async function identify ({ relayUrl, userId, anonymousId, getToken }) {
  const body = JSON.stringify({ identified_id: userId, anon_id: anonymousId })
  for (let attempt = 1; ; attempt++) {
    const token = await getToken?.()
    const { status, error, isRetryable, retryAfterMs } = await send(`${relayUrl}/identify`, body, token)
    if (status !== undefined) return status
    if (!isRetryable || attempt === MAX_ATTEMPTS || retryAfterMs > MAX_PAUSE_MS) throw error
    // Half of the pause is random, so that pages that failed together do not return together.
    const backoffMs = FIRST_PAUSE_MS * 2 ** (attempt - 1) * (0.5 + Math.random() / 2)
    await new Promise(resolve => setTimeout(resolve, Math.max(backoffMs, retryAfterMs)))
  }
}

/**
 * Hands an identity to the browser, which sends it even if the page unloads. Returns false if the browser refuses it.
 * Only for a relay that serves anonymous callers, because a beacon carries no token. A failed beacon is not repeated.
 *
 * @param {{ relayUrl: string, userId: string, anonymousId: string }} options as for `identify`
 */
export function identifyByBeacon ({ relayUrl, userId, anonymousId }) {
  // A string is sent as text/plain, in one request. A Blob of application/json would first need a preflight, and an
  // answer that allows credentials, while the page unloads.
  return navigator.sendBeacon(`${relayUrl}/identify`, JSON.stringify({ identified_id: userId, anon_id: anonymousId }))
}

async function send (url, body, token) {
  let response
  try {
    response = await fetch(url, {
      method: 'POST',
      headers: { 'content-type': 'application/json', ...token !== undefined && { authorization: `Bearer ${token}` } },
      body,
      // The request survives the page, as when a sign-in leads to another page.
      keepalive: true
    })
  } catch (error) {
    // The network failed, or the relay does not list the origin of this page: a browser does not say which.
    return { error, isRetryable: true, retryAfterMs: 0 }
  }
  const answer = await response.json().catch(() => ({}))
  if (response.ok) return { status: answer.status }
  return {
    error: Object.assign(new Error(answer.detail ?? `The relay answered ${response.status}.`), { problem: answer }),
    isRetryable: answer.retryable ?? RETRYABLE.includes(response.status),
    retryAfterMs: (Number(response.headers.get('retry-after')) || 0) * 1000
  }
}
