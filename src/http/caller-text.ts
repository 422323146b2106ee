import { secretsOf, type Config } from '../config.ts'

/** The most characters of a caller's text in one field of the log. */
const MAX_LENGTH = 100

/** The words of a text, and its segments. Each expression passes over the text once: a caller may send 32 KB. */
const WORDS = /[\w.~-]{24,}/g
const TOKENS = /eyJ[\w.-]{6,}/gi
const SEGMENTS = /[^\s/]+/g

export type CallerText = ReturnType<typeof createCallerText>

/** Makes texts of callers, such as the path of a request without a route, fit for the log. */
export function createCallerText (config: Config) {
  let secrets: string[] = []

  /** Takes the secrets of a changed configuration. Callers may still use the earlier ones. */
  function use (changed: Config): void {
    const current = secretsOf(changed).flatMap(secret => [secret, encodeURIComponent(secret)])
    secrets = [...new Set([...current, ...secrets])].slice(0, MAX_SECRETS)
  }
  use(config)

  return {
    use,
    /** Returns at most 100 characters of `text`, with secrets and whatever may be one replaced by `***`. */
    forLog: (text: string) => secrets.reduce((masked, secret) => masked.replaceAll(secret, '***'), text)
      // A credential, a UUID or an address for mail. A word without digits is none of these.
      .replaceAll(WORDS, word => /\d/.test(word) ? '***' : word).replaceAll(TOKENS, '***')
      .replaceAll(SEGMENTS, segment => /@|%40/.test(segment) ? '***' : segment).slice(0, MAX_LENGTH)
  }
}

/** API_KEYS may have a hundred, and some changes of them are remembered. */
const MAX_SECRETS = 1000
