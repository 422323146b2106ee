import type { Config } from '../config.ts'

export type Credentials = ReturnType<typeof createCredentials>

/** The token and what requests carry of it. No layer to the left of `mixpanel/` uses either. */
export function createCredentials (config: Config) {
  const { MIXPANEL_TOKEN: token, MIXPANEL_SERVICE_ACCOUNT: account } = config
  const closing = `,"token":${JSON.stringify(token)}}}`
  // Mixpanel's reasons may quote the request, with a secret in any of these forms.
  const secrets = [token, account, account?.replace(/^[^:]*:/, '')].flatMap(secret => secret === undefined
    ? []
    : [secret, JSON.stringify(secret).slice(1, -1), encodeURIComponent(secret), base64(secret), base64(`${secret}:`)])

  return {
    /** The `authorization` header of `/import`. */
    basic: `Basic ${base64(account ?? `${token}:`)}`,

    /** Returns an event's JSON with the token as its last property. */
    withToken (json: string): string {
      return `${json.slice(0, -2)}${closing}`
    },

    /** Returns `text` with every form of every secret replaced by `***`. */
    mask: (text: string) => secrets.reduce((masked, secret) => masked.replaceAll(secret, '***'), text)
  }
}

const base64 = (text: string) => Buffer.from(text).toString('base64')
