import type { Config } from '../config.ts'
import type { PendingEvent } from '../identity/event.ts'
import { MARK_LENGTH } from '../identity/sdk-event.ts'

export type Credentials = ReturnType<typeof createCredentials>

type Secrets = Pick<Config, 'MIXPANEL_TOKEN' | 'MIXPANEL_SERVICE_ACCOUNT'>

/** Answers to requests with earlier secrets may still arrive, and quote them. */
const MAX_FORMS = 100

/** The token and what requests carry of it. No layer to the left of `mixpanel/` uses either. */
export function createCredentials (config: Secrets) {
  let basic = ''
  let closing = ''
  let encodedClosing = ''
  let quoted = ''
  let current = ''
  /** Every form of every secret that a reason of Mixpanel may quote from a request. */
  let forms: string[] = []

  /** Takes the secrets of `config` for all later requests. */
  function use ({ MIXPANEL_TOKEN: token, MIXPANEL_SERVICE_ACCOUNT: account }: Secrets): void {
    basic = `Basic ${base64(account ?? `${token}:`)}`
    current = token
    quoted = JSON.stringify(token)
    closing = `,"token":${quoted}}}`
    encodedClosing = encodeURIComponent(closing)
    const present = [token, account, account?.replace(/^[^:]*:/, '')].flatMap(secret => secret === undefined
      ? []
      : [secret, JSON.stringify(secret).slice(1, -1), encodeURIComponent(secret), base64(secret), base64(`${secret}:`)])
    forms = [...new Set([...present, ...forms])].slice(0, MAX_FORMS)
  }
  use(config)

  /** Returns an event's JSON with the token: in an SDK's event where its own stood, else as the last property. */
  function withToken ({ json, tokenAt }: PendingEvent): string {
    if (tokenAt === undefined) return `${json.slice(0, -2)}${closing}`
    let text = ''
    let from = 0
    for (const at of tokenAt) {
      text += json.slice(from, at) + quoted
      from = at + MARK_LENGTH
    }
    return text + json.slice(from)
  }

  return {
    use,

    /** Returns the `authorization` header of `/import`. */
    basic: () => basic,

    withToken,

    /** Returns the same, percent-encoded. */
    encodedWithToken: (event: PendingEvent): string =>
      event.encoded === undefined ? encodeURIComponent(withToken(event)) : event.encoded + encodedClosing,

    /** Returns true if `text` looks like the token of another project. */
    isForeignToken: (text: string) => /^[0-9a-f]{32}$/i.test(text) && text !== current,

    /** Returns `text` with every form of every secret, earlier ones included, replaced by `***`. */
    mask: (text: string) => forms.reduce((masked, form) => masked.replaceAll(form, '***'), text)
  }
}

const base64 = (text: string) => Buffer.from(text).toString('base64')
