import type { Config } from '../config.ts'

export type Credentials = ReturnType<typeof createCredentials>

type Secrets = Pick<Config, 'MIXPANEL_TOKEN' | 'MIXPANEL_SERVICE_ACCOUNT'>

/** Answers to requests with earlier secrets may still arrive, and quote them. */
const MAX_FORMS = 100

/** The token and what requests carry of it. No layer to the left of `mixpanel/` uses either. */
export function createCredentials (config: Secrets) {
  let basic = ''
  let closing = ''
  /** Every form of every secret that a reason of Mixpanel may quote from a request. */
  let forms: string[] = []

  /** Takes the secrets of `config` for all later requests. */
  function use ({ MIXPANEL_TOKEN: token, MIXPANEL_SERVICE_ACCOUNT: account }: Secrets): void {
    basic = `Basic ${base64(account ?? `${token}:`)}`
    closing = `,"token":${JSON.stringify(token)}}}`
    const current = [token, account, account?.replace(/^[^:]*:/, '')].flatMap(secret => secret === undefined
      ? []
      : [secret, JSON.stringify(secret).slice(1, -1), encodeURIComponent(secret), base64(secret), base64(`${secret}:`)])
    forms = [...new Set([...current, ...forms])].slice(0, MAX_FORMS)
  }
  use(config)

  return {
    use,

    /** Returns the `authorization` header of `/import`. */
    basic: () => basic,

    /** Returns an event's JSON with the token as its last property. */
    withToken: (json: string) => `${json.slice(0, -2)}${closing}`,

    /** Returns `text` with every form of every secret, earlier ones included, replaced by `***`. */
    mask: (text: string) => forms.reduce((masked, form) => masked.replaceAll(form, '***'), text)
  }
}

const base64 = (text: string) => Buffer.from(text).toString('base64')
